"""Speed of the parts, each beside a peer in the same run; `make bench`."""
