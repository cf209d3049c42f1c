"""What can be set, and how it is read from files and the command line."""
