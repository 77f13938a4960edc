"""Reports: verdicts made readable. A report takes verdicts and returns text; it judges nothing and reads nothing."""
