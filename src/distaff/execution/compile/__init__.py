"""What programs are compiled for, and why they compile again."""
