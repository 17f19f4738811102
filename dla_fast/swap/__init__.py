"""Model surgery: swap aggregation nodes of existing models for fused ones, and back."""
