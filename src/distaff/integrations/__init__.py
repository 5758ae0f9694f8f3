"""One file per third party, each found by string and imported by nobody."""
