"""The command line: `distaff fit <recipe>`."""
