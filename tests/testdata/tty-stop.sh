# Stops itself by the signal $1, then reads a line.
echo "ready $$"
kill -"$1" $$
read -r line
echo "line $line"
