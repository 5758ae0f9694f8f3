"""Population-based training: members that do badly continue from those that do well."""
