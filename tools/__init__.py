"""Programs that maintainers run, most of them by make."""
