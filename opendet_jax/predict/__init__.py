"""A trained model put to use: the Detector, its Detections, and pictures of them."""
