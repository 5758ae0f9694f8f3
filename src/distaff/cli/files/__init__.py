"""Files of arrays and tables that commands read and write."""
