"""What is needed around the product: the demo, the check of prerequisites, files for containers and monitoring."""
