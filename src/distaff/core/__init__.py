"""Types, options, paths and files that all other packages use."""
