"""Files and folders: written whole, read with their headers checked."""
