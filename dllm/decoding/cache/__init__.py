"""Cache policies: which positions a step recomputes, which keys it sees, what stays in the store."""
