"""The workflow language: compiles YAML text into a Plan."""
