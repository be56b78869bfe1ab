"""HTTP requests that end by a deadline and reach only the hosts that they may."""
