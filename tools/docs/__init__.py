"""What the site takes from the code: pictures, tables, and a runner for the code of its pages."""
