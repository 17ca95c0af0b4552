"""From the four sums of each unit to what a row of the table says of them."""
