"""How good the detections are: LVIS's average precision, and localisation and naming apart."""
