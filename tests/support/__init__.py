"""What tests share: waiting for a condition, the product as a user runs it, parts of it in processes of their own."""
