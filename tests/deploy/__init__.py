"""What the gateway ships for the software around it, checked without that software."""
