"""What a judge's answer says."""
