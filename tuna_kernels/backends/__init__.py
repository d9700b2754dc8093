"""The computing rooms: every public function validates and shapes, a backend computes."""
