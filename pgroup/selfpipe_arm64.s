#include "textflag.h"

#define SYS_write 64
#define SIGURG 23

// The kernel calls these with the signal in R0 and the siginfo_t in R1, on the
// runtime's signal stack; the return address is that of rt_sigreturn.

TEXT selfPipe<>(SB),NOSPLIT|NOFRAME,$0-0
	MOVW	·selfPipeFD(SB), R0
	MOVD	$24, R2
	MOVD	$SYS_write, R8
	SVC
	RET

// si_code is more than 0 for a fault, -6 (SI_TKILL) for the runtime's SIGURG.
TEXT selfPipeSent<>(SB),NOSPLIT|NOFRAME,$0-0
	MOVW	8(R1), R3
	CMPW	$0, R3
	BGT	runtimes
	CMPW	$-6, R3
	BNE	sent
	CMPW	$SIGURG, R0
	BEQ	runtimes
sent:
	JMP	selfPipe<>(SB)
runtimes:
	MOVD	·goHandler(SB), R3
	JMP	(R3)

// func selfPipeHandler() uintptr
TEXT ·selfPipeHandler(SB),NOSPLIT,$0-8
	MOVD	$selfPipe<>(SB), R0
	MOVD	R0, ret+0(FP)
	RET

// func selfPipeSentHandler() uintptr
TEXT ·selfPipeSentHandler(SB),NOSPLIT,$0-8
	MOVD	$selfPipeSent<>(SB), R0
	MOVD	R0, ret+0(FP)
	RET
