"""Everything that changes the speed of a model and none of its numbers beyond rounding."""
