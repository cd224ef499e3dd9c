const socket = require('dgram').createSocket(process.argv[2])
socket.on('message', (m, from) => socket.send(m + ' ' + process.pid, from.port, from.address))
socket.bind(0, process.argv[3], () => process.send({ listening: socket.address() }))
