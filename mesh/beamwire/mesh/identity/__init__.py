"""Identity and trust: who a member is, what proves it, who vouches for it, and what it may hand on."""
