"""The bundled workflows: YAML files, listed in `index.yaml`; `templates/` holds what `gorgon init` copies."""
