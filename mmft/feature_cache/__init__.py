"""What a frozen vision part computes, and what a row is as tokens, are computed once and kept: in memory or below output_dir/cache."""
