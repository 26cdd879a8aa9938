"""Every architecture of transformers, made tiny and run through what lingrad does; `make architectures` writes the table."""
