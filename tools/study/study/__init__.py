"""What the commands of this folder stand on: see its README."""
