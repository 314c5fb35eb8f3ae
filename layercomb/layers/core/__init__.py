"""What every layer is made of: `Layer`, `Combinator`, and what they check, print and name."""
