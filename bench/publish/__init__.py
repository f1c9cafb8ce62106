"""From the results to what is published: tables, pictures, documents. Measures nothing."""
