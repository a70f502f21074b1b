"""What the loop needs that is none of the other packages."""
