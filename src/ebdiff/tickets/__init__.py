"""Early-bird tickets: mask histories, the rule, and the stages that draw tickets."""
