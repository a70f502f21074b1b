"""adapter_files."""
