"""The report's pictures: each a pure function from what was measured to inline SVG."""
