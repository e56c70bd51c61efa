"""What `plait compress` consists of besides the compression itself: words, text, estimates, pages."""
