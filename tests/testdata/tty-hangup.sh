# Ignores the hang-up as nohup does; if $1 is TERM, notes a TERM in the file
# $2 and ends, else ignores that too. Its child does as it does.
trap '' HUP
if [ "$1" = TERM ]; then
	trap 'echo TERM >"$2"; exit' TERM
else
	trap '' TERM
fi
sleep 60 &
echo "ready $$"
wait
