"""What the project is compared with: loops by hand and libraries, each as its users would run it."""
