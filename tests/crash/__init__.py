"""What happens when the pilot dies, at every boundary there is."""
