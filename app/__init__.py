"""The web interface: four tabs that call what the command line calls. `server.serve` opens it."""
