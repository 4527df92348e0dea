"""What two papers or more use."""
