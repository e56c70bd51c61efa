"""The meaning of every operation: one public function each, with a plain reference and its fast backends."""
