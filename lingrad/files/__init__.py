"""Files and folders: written atomically, read with their headers checked."""
