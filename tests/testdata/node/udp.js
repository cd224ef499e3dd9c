const socket = require('dgram').createSocket('udp4')
socket.on('message', (m, from) => socket.send(`udp ${process.env.PGROUP_WORKER} ${process.pid}\n`, from.port, from.address))
socket.bind(JSON.parse(process.argv[2]), () => console.log(JSON.stringify(socket.address())))
