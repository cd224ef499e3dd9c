# Says that it is there, and stays.
echo "ready $$"
exec sleep 60
