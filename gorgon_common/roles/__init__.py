"""The roles that agents play: one YAML file each, and the catalogue that reads them."""
