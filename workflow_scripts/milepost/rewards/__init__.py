"""Rule-based rewards: is the boxed answer of a response the label's."""
