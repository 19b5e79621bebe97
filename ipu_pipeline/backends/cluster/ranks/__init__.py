"""How the processes of a job meet, agree, watch each other and end."""
