"""The command line, and its tables and plots, which the web page shows, too."""
