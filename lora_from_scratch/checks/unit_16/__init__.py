"""Unit 16: fewer numbers than rank one."""
