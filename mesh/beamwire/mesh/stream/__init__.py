"""The data plane: connect strings, frames, SP sockets, and the producers and consumers that speak them."""
